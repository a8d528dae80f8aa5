"""How good embeddings are: the verification protocol and its reports."""
