"""What tickets look like: `compare` measures their masks, `table` shows them on a terminal, `plot` draws them."""
