"""What becomes of one chunk's bytes: digests, codecs, deltas against a base, blobs and packs; and the way back."""
