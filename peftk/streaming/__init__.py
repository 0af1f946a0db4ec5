"""Whole checkpoints, tensor by tensor and shard by shard: quantised or merged in memory that doesn't grow with the model.

``safetensors_file``  the format's header and bytes, read and written in pieces
``source``            the tensors of a checkpoint, wherever they are stored
``values``            a weight as floats, a range at a time: from a file, decoded from 4 bits
``outputs``           what becomes of a weight: copied, cast, in 4 bits; and how far it then lies from what it was
``skeleton``          the model without weights: which layers go into 4 bits, and under which names a file has them
``merging``           a weight with an adapter added, a range at a time
``work``              the folder: shards kept from a killed run, one run at a time, whole at the end
``report``            the error of each layer as a table and a picture
"""
