//! CRIU formats: page-server frames, the lazy-pages hand-over and image files.
