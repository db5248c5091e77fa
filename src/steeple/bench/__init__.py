"""The bench: drafters against plain decoding in one process, interleaved, with the floor of the machine beside them."""
