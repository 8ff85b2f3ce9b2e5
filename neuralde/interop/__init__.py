"""Other packages' programs on neuralde, and neuralde's solvers in other packages. Imported by name only."""
