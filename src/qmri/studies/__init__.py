"""The source papers' studies, one module each: from a seed to the artefacts the book shows."""
