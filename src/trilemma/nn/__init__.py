"""Parts that mixers and models are made of."""
