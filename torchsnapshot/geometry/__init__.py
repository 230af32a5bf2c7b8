"""Where the parts of a tensor lie: boxes, grids of cells, memory order, meshes and placements. Numbers, no bytes."""
