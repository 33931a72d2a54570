"""Models: finding them, reading what they are, loading, sharding and adapting them."""
