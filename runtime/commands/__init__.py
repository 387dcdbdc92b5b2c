"""The commands of `knnmoe`, one file each; none imports anything heavy before it runs."""
