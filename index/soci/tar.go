package soci

import (
	"io"

	"github.com/varvefs/varve/index"
)

// Tar gives the layer's tar from its data file, in which everything must be
// present. It ends where the zTOC says that the tar does. SOCI's own builder
// stops at the two blocks of zeroes that end a tar, so that a gzip blob may hold
// more than it knows of: tars are often padded with zeroes to 10 KiB.
func (l *Layer) Tar(data io.ReaderAt) io.Reader { return index.Rebuild(l.Frames, data) }
