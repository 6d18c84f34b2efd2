"""What is made of draws: diagnostics, predictive laws, evidence, export."""
