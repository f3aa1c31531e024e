package index

import (
	"sync"

	"github.com/klauspost/compress/zstd"
)

// expanders decompress what this package compressed itself.
var expanders = sync.Pool{New: func() any {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(MaxTOCSize))
	if err != nil {
		panic(err) // the options are constant
	}
	return d
}}
