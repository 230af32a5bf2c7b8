"""The old torchsnapshot's name for ``adapters``; each module is imported on its own."""
