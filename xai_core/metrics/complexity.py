"""How concentrated a map is."""
