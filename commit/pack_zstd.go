package commit

import "github.com/klauspost/compress/zstd"

// zstdForm is many frames of zstd one after the other, which RFC 8878 (3.1)
// allows.
var zstdForm = form{frame: mib, codec: newZstd}

// zstdWindow bounds how far back an encoder looks, and the memory that it and
// every decoder take.
const zstdWindow = mib

type zstdCodec struct{ w *zstd.Encoder }

// newZstd makes an encoder whose output does not depend on the machine.
func newZstd() (codec, error) {
	w, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithEncoderConcurrency(1),
		zstd.WithWindowSize(zstdWindow), zstd.WithLowerEncoderMem(true))
	return &zstdCodec{w}, err
}

func (c *zstdCodec) member(dst, raw []byte) ([]byte, error) {
	return c.w.EncodeAll(raw, dst), nil
}
