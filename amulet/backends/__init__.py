"""What computes logits: `base` is the seam, and each sub-package stands behind it."""
