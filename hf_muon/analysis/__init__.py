"""What training does to a model, measured: on torch alone, reading weights and activations, never the optimizer."""
