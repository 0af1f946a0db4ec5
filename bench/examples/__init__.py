"""Other packages' own code, on real inputs, with peftk beneath it. Each runs by itself and in the tests."""
