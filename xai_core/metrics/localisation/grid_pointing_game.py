"""Grid pointing game: relevance in the right cell of a mosaic."""
