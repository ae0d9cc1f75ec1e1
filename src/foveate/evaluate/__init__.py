"""What reduction costs in accuracy: data sets, a model that answers, scoring, comparison with the full model."""
