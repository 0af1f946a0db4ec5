from peftk.format.nf4 import NF4Weight
from peftk import ops
from peftk.ops import quantize_nf4
from peftk.ops.dispatch import use
