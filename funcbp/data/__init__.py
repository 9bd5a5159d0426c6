"""Small real data that ships with the library, and batches of any data."""

from funcbp.data.batches import batches as batches
from funcbp.data.digits import Digits as Digits
from funcbp.data.digits import digits as digits
