"""ROAD: remove pixels and fill the gap so that the mask itself tells nothing."""
