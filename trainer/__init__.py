"""Batches to model: the decoder, the engines, the checkpoint and the loop."""
