"""The command line and what it runs: recipes, each a dataclass of configuration and a function."""
