"""AIC and SIC: performance against the information that a picture regains."""
