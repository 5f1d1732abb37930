"""IROF: how fast removing whole parts takes the model's answer away."""
