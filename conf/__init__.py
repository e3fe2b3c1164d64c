"""What a run is: the typed schema, the YAML groups that fill it, and the registry of things found by name."""
