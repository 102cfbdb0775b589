"""The shipped model `long-eclip-mini`: its network and how it was trained."""
