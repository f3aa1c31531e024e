package soci

import flatbuffers "github.com/google/flatbuffers/go"

// The fields of a zTOC's tables, by their place in the schema
// (ztoc/fbs/ztoc.fbs and ztoc/compression/fbs/zinfo.fbs in soci-snapshotter).
const (
	ztocVersion = iota
	ztocTool
	ztocCompressed
	ztocUncompressed
	ztocTOC
	ztocInfo
	ztocFields
)

const (
	tocMetadata = iota
	tocFields
)

const (
	fileName = iota
	fileType
	fileOffset
	fileSize
	fileLink
	fileMode
	fileUID
	fileGID
	fileUname
	fileGname
	fileModTime
	fileDevmajor
	fileDevminor
	filePAX // called xattrs there
	fileFields
)

const (
	paxKey = iota
	paxValue
	paxFields
)

const (
	infoAlgorithm = iota
	infoMaxSpan
	infoDigests
	infoCheckpoints
	infoFields
)

const (
	tarinfoVersion = iota
	tarinfoSpanSize
	tarinfoSize
	tarinfoFields
)

const (
	version        = "0.9" // of a zTOC
	tarinfoCurrent = 2     // version of the spans of a plain tar

	algorithmGzip         = 1
	algorithmUncompressed = 2
)

// table reads a flatbuffer's table. What it gives aliases the buffer; it panics
// where the buffer is wrong.
type table struct{ flatbuffers.Table }

// at gives where a field is, 0 where the table leaves it out.
func (t *table) at(field int) flatbuffers.UOffsetT {
	return flatbuffers.UOffsetT(t.Offset(flatbuffers.VOffsetT(4 + 2*field)))
}

func (t *table) int64(field int) int64 {
	if o := t.at(field); o != 0 {
		return t.GetInt64(t.Pos + o)
	}
	return 0
}

func (t *table) uint32(field int) uint32 {
	if o := t.at(field); o != 0 {
		return t.GetUint32(t.Pos + o)
	}
	return 0
}

func (t *table) byte(field int, absent byte) byte {
	if o := t.at(field); o != 0 {
		return t.GetByte(t.Pos + o)
	}
	return absent
}

// text gives a string, "" where there is none.
func (t *table) text(field int) string {
	if o := t.at(field); o != 0 {
		return t.String(t.Pos + o)
	}
	return ""
}

func (t *table) bytes(field int) []byte {
	if o := t.at(field); o != 0 {
		return t.ByteVector(t.Pos + o)
	}
	return nil
}

func (t *table) table(field int) (sub table, ok bool) {
	o := t.at(field)
	if o == 0 {
		return table{}, false
	}
	return table{flatbuffers.Table{Bytes: t.Bytes, Pos: t.Indirect(t.Pos + o)}}, true
}

// vector is a list of tables or strings.
type vector struct {
	t    *table
	from flatbuffers.UOffsetT
	n    int
}

// vector gives a list whose elements all lie within the buffer, so that its
// length is no greater than a quarter of the buffer's.
func (t *table) vector(field int) vector {
	o := t.at(field)
	if o == 0 {
		return vector{}
	}
	v := vector{t: t, from: t.Vector(o), n: t.VectorLen(o)}
	_ = t.Bytes[v.from:][:4*v.n]
	return v
}

func (v *vector) table(i int) table {
	return table{flatbuffers.Table{Bytes: v.t.Bytes, Pos: v.t.Indirect(v.from + flatbuffers.UOffsetT(4*i))}}
}

func (v *vector) text(i int) string { return v.t.String(v.from + flatbuffers.UOffsetT(4*i)) }
