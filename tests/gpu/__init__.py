"""What only a real device shows, and a stand-in for one that has a scripted clock."""
