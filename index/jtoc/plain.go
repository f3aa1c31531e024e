package jtoc

import "encoding/json"

// UnmarshalJSON reads an entry as encoding/json would. It is given one whole JSON
// value. Nearly all are objects of a few plain strings and numbers: those are read
// here, for half the time and a third of the garbage.
func (e *entry) UnmarshalJSON(doc []byte) error {
	p := plain{doc}
	if p.entry(e) {
		return nil
	}
	e.reset()
	type slow entry // without this method
	return json.Unmarshal(doc, (*slow)(e))
}

// plain reads valid JSON. Whatever it is not made for it leaves to encoding/json:
// then a method is false, and what was read means nothing.
type plain struct{ rest []byte }

func (p *plain) entry(e *entry) bool {
	if !p.next('{') {
		return false
	}
	for {
		key, ok := p.text()
		if !ok || !p.next(':') {
			return false
		}
		switch string(key) {
		case "type":
			ok = p.kind(&e.Type)
		case "name":
			ok = p.string(&e.Name, "")
		case "linkName":
			ok = p.string(&e.LinkName, "")
		case "modtime":
			ok = p.string(&e.ModTime, e.lastTime)
			e.lastTime = e.ModTime
		case "digest":
			ok = p.string(&e.Digest, "")
		case "chunkDigest":
			ok = p.string(&e.ChunkDigest, e.Digest) // of a file in one chunk
		case "mode":
			ok = p.number(&e.Mode)
		case "size":
			ok = p.number(&e.Size)
		case "uid":
			ok = p.number(&e.UID)
		case "gid":
			ok = p.number(&e.GID)
		case "offset":
			ok = p.number(&e.Offset)
		case "innerOffset":
			ok = p.number(&e.InnerOffset)
		case "endOffset":
			ok = p.number(&e.EndOffset)
		case "chunkOffset":
			ok = p.number(&e.ChunkOffset)
		case "chunkSize":
			ok = p.number(&e.ChunkSize)
		default:
			return false
		}
		if !ok {
			return false
		}
		if !p.next(',') {
			return p.next('}') && len(p.rest) == 0
		}
	}
}

// next takes one character of JSON's own.
func (p *plain) next(c byte) bool {
	p.space()
	if len(p.rest) == 0 || p.rest[0] != c {
		return false
	}
	p.rest = p.rest[1:]
	p.space()
	return true
}

func (p *plain) space() {
	for len(p.rest) > 0 && (p.rest[0] == ' ' || p.rest[0] == '\n' || p.rest[0] == '\t' || p.rest[0] == '\r') {
		p.rest = p.rest[1:]
	}
}

// text takes a string of printable ASCII without escapes.
func (p *plain) text() ([]byte, bool) {
	if len(p.rest) == 0 || p.rest[0] != '"' {
		return nil, false
	}
	for i, c := range p.rest[1:] {
		switch {
		case c == '"':
			s := p.rest[1 : 1+i]
			p.rest = p.rest[i+2:]
			return s, true
		case c == '\\' || c < ' ' || c > '~':
			return nil, false
		}
	}
	return nil, false
}

// string takes a string, which is the one given if it is equal to it.
func (p *plain) string(to *string, like string) bool {
	s, ok := p.text()
	if !ok {
		return false
	}
	if string(s) == like {
		*to = like
	} else {
		*to = string(s)
	}
	return true
}

func (p *plain) kind(to *string) bool {
	s, ok := p.text()
	for _, known := range [...]string{"reg", "dir", "symlink", "hardlink", "chunk"} {
		if string(s) == known {
			*to = known
			return ok
		}
	}
	return false
}

// number takes a whole number that surely fits.
func (p *plain) number(to *int64) bool {
	const digits = 18
	n, i := int64(0), 0
	for ; i < len(p.rest) && p.rest[i] >= '0' && p.rest[i] <= '9'; i++ {
		if i == digits {
			return false
		}
		n = 10*n + int64(p.rest[i]-'0')
	}
	if i == 0 || i < len(p.rest) && (p.rest[i] == '.' || p.rest[i] == 'e' || p.rest[i] == 'E') {
		return false
	}
	p.rest = p.rest[i:]
	*to = n
	return true
}
