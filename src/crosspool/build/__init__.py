"""The composition root: control puts the torch-free part together, runtime adds workers and devices."""
