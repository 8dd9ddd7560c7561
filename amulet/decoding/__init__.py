"""The decode engine and the choice of each token; works on token ids only."""
