"""``steeple bench select``: drafters chosen per request, against each of them alone and against an oracle."""
