// Package forms gives one root file system every form that a registry may
// hold it in, so that a measurement differs in the form alone.
package forms

import (
	"fmt"
	"strings"

	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Form is how the layers of an image are written.
type Form string

const (
	// Gzip is one gzip member a layer, with no index.
	Gzip Form = "gzip"
	// Zstd is one zstd frame a layer, with no index.
	Zstd Form = "zstd"
	// Tar is not compressed.
	Tar Form = "tar"
	// EStargz is a gzip member a chunk, as nerdctl and ctr-remote convert.
	EStargz Form = "estargz"
	// ZstdChunked is the dialect of stargz-snapshotter, nerdctl and BuildKit.
	ZstdChunked Form = "zstdchunked"
	// ZstdChunkedContainers is the dialect of Podman, buildah and skopeo.
	ZstdChunkedContainers Form = "zstdchunked-containers"
)

// Forms lists all of them.
func Forms() []Form {
	return []Form{Gzip, Zstd, Tar, EStargz, ZstdChunked, ZstdChunkedContainers}
}

// ParseForm reads a form's name.
func ParseForm(s string) (Form, error) {
	var names []string
	for _, f := range Forms() {
		if s == string(f) {
			return f, nil
		}
		names = append(names, string(f))
	}
	return "", fmt.Errorf("no form %q; there are %s", s, strings.Join(names, ", "))
}

func (f Form) mediaType() types.MediaType {
	switch f {
	case Tar:
		return types.OCIUncompressedLayer
	case Zstd, ZstdChunked, ZstdChunkedContainers:
		return types.OCILayerZStd
	}
	return types.OCILayer
}

// Options shapes a conversion.
type Options struct {
	// Dir takes the blobs. It must exist, outlive the images made, and is for
	// the caller to remove. EStargz and ZstdChunked need scratch space in the
	// system's temporary directory besides.
	Dir string
	// ChunkSize cuts the files of EStargz and ZstdChunked, in bytes; 0 is
	// 4 MiB. ZstdChunkedContainers cuts by content.
	ChunkSize int
	// Level is gzip's, 1 to 9; 0 is 6. zstd always has its default level.
	Level int
	// Prioritized files come first in EStargz and ZstdChunked layers, before
	// the landmark. Names that a layer does not have are passed over.
	Prioritized []string
}

func (o Options) chunkSize() int {
	if o.ChunkSize <= 0 {
		return 4 << 20
	}
	return o.ChunkSize
}

func (o Options) level() int {
	if o.Level == 0 {
		return 6
	}
	return o.Level
}
