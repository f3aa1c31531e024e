package image

import (
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// IsDocker reports whether the image is of docker's family of media types
// (schema 2), not of OCI's.
func (m *Manifest) IsDocker() bool { return m.MediaType == MediaTypeDockerManifest }

// layerFamilies pairs what the two families call the same layer, without the
// compression. What docker calls foreign is OCI's nondistributable.
var layerFamilies = []struct{ docker, oci string }{
	{MediaTypeDockerLayer, ocispec.MediaTypeImageLayer},
	{mediaTypeDockerForeign, ociNondistributable},
}

// LayerType gives the media type that a layer of the type mt has in docker's
// family, or in OCI's; mt itself where it is of that family. It gives false for
// what is no layer, or not one that can be read. Docker's own tools know no
// zstd, but the name exists.
func LayerType(mt string, docker bool) (string, bool) {
	for _, f := range layerFamilies {
		for _, compression := range []string{"", "gzip", "zstd"} {
			d, o := f.docker, f.oci
			if compression != "" {
				d, o = d+"."+compression, o+"+"+compression
			}
			switch {
			case mt != d && mt != o:
			case docker:
				return d, true
			default:
				return o, true
			}
		}
	}
	return "", false
}

// Zstd reports whether the layer is compressed with zstd, which only OCI's
// family of media types provides for.
func (l Layer) Zstd() bool {
	return strings.HasSuffix(l.MediaType, "+zstd") || strings.HasSuffix(l.MediaType, ".zstd")
}
