package commit

import "github.com/klauspost/compress/gzip"

// gzipLevel gives blobs of the size that gzip -6 and pigz give.
const gzipLevel = 6

// gzipForm is many members of gzip one after the other, which RFC 1952 (2.2)
// allows, and every reader of images takes for one stream. Short of what their
// window loses at each beginning, they take no more room than one would.
var gzipForm = form{frame: mib, codec: newGzip}

// gzipCodec writes members without name and time, and with the operating system
// that means unknown, so that they are the same everywhere.
type gzipCodec struct {
	w   *gzip.Writer
	out appender
}

func newGzip() (codec, error) {
	w, err := gzip.NewWriterLevel(nil, gzipLevel)
	return &gzipCodec{w: w}, err
}

func (c *gzipCodec) member(dst, raw []byte) ([]byte, error) {
	c.out.b = dst
	c.w.Reset(&c.out)
	if _, err := c.w.Write(raw); err != nil {
		return nil, err
	}
	if err := c.w.Close(); err != nil {
		return nil, err
	}
	return c.out.b, nil
}

type appender struct{ b []byte }

func (a *appender) Write(p []byte) (int, error) {
	a.b = append(a.b, p...)
	return len(p), nil
}
