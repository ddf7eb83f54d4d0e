"""The process that runs where the volume is mounted: a plan in, progress and one result out. It knows no Kubernetes."""
