"""How much of a map lies on the object: shares of relevance, overlap of regions."""
