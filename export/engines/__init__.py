"""bundle → engines for one device: `knnmoe engines build`."""
