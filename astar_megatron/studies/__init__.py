"""Several runs looked at together: methods side by side, scaling studies, and what curves of scores foretell."""
