"""The mathematics: tensors in, tensors out. No models, files or devices live here."""
