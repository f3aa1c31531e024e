package monitor

import (
	"fmt"
	"strings"
)

// parseKeys reads detach keys as docker writes them: letters, digits or ctrl- with
// a letter or one of @ [ \ ] ^ _, separated by commas.
func parseKeys(s string) ([]byte, error) {
	switch s {
	case "":
		s = "ctrl-p,ctrl-q"
	case "none":
		return nil, nil
	}
	var keys []byte
	for name := range strings.SplitSeq(s, ",") {
		ctrl, is := strings.CutPrefix(strings.ToLower(name), "ctrl-")
		switch {
		case is && len(ctrl) == 1 && (ctrl[0] >= 'a' && ctrl[0] <= 'z' || strings.ContainsRune(`@[\]^_`, rune(ctrl[0]))):
			keys = append(keys, ctrl[0]&0x1f)
		case len(name) == 1 && name[0] > ' ' && name[0] < 0x7f:
			keys = append(keys, name[0])
		default:
			return nil, fmt.Errorf("detach keys %q: %q is no key (a letter, or ctrl- and a letter or one of @[\\]^_)", s, name)
		}
	}
	return keys, nil
}

// keyScanner finds the detach keys in what is typed.
type keyScanner struct {
	keys []byte
	seen int // how many of them were typed last, and are held back
}

// scan gives what is to be sent of p, and whether the keys were complete: what
// follows them is not sent.
func (k *keyScanner) scan(p []byte) (out []byte, detach bool) {
	if len(k.keys) == 0 {
		return p, false
	}
	out = make([]byte, 0, len(p)+len(k.keys))
	for _, c := range p {
		if c == k.keys[k.seen] {
			if k.seen++; k.seen == len(k.keys) {
				return out, true
			}
			continue
		}
		out = append(out, k.keys[:k.seen]...)
		if k.seen = 0; c == k.keys[0] {
			if k.seen = 1; len(k.keys) == 1 {
				return out, true
			}
			continue
		}
		out = append(out, c)
	}
	return out, false
}
