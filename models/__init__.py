"""What programs are written with: networks, transition kernels, task streams and data sets."""
