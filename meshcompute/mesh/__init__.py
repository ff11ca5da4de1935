"""One cluster over several sites: booted, watched, changed in size and taken down."""
