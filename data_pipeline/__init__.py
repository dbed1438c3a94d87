"""Paired images as sharded webdataset tars: packing, order, streaming. The lowest layer: imports nothing of ours."""
