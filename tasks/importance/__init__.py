"""The evaluation of networks that say themselves which patches matter (IA, EA, PA), as stages of a study."""
