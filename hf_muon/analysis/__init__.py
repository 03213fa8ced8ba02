"""What training does to a model, measured on torch alone: spectra of weights, and attention logits."""
