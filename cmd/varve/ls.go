package main

import (
	"bufio"
	"fmt"
	"os"
	"path"
	"strings"

	"github.com/spf13/cobra"

	"github.com/varvefs/varve/daemon"
)

func (a *app) lsCmd() *cobra.Command {
	var o daemon.PathOptions
	var long bool
	cmd := &cobra.Command{
		Use:   "ls [flags] IMAGE [PATH]",
		Short: "List a directory of an image without mounting it",
		Args:  cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			o.Path = "/"
			if len(args) == 2 {
				o.Path = args[1]
			}
			if err := setImage(&o.ImageOptions, args[0]); err != nil {
				return err
			}
			w := bufio.NewWriter(os.Stdout)
			defer w.Flush()
			l := lister{w: w, long: long, recursive: o.Recursive}
			return c.List(cmd.Context(), o, l.print)
		},
	}
	f := cmd.Flags()
	imageFlags(f, &o.ImageOptions)
	f.BoolVarP(&long, "long", "l", false, "modes, links, owners, sizes, times")
	f.BoolVarP(&o.Recursive, "recursive", "R", false, "the directories in it too")
	return cmd
}

// lister prints files as ls(1) does.
type lister struct {
	w         *bufio.Writer
	long      bool
	recursive bool
	inDir     bool
}

func (l *lister) print(f daemon.File) error {
	if f.Dir {
		if l.recursive {
			if l.inDir {
				fmt.Fprintln(l.w)
			}
			fmt.Fprintln(l.w, f.Path+":")
		}
		l.inDir = true
		return nil
	}
	name := f.Path
	if l.inDir {
		name = path.Base(f.Path)
	}
	if l.long {
		size := fmt.Sprint(f.Size)
		if t := f.Mode >> 12; t == 2 || t == 6 { // S_IFCHR, S_IFBLK
			size = fmt.Sprintf("%d, %d", f.Rdev>>8&0xfff, f.Rdev&0xff|f.Rdev>>12&^0xff)
		}
		name = fmt.Sprintf("%s %3d %5d %5d %10s %s %s", modeString(f.Mode), f.Nlink, f.UID, f.GID, size, f.ModTime.Format("2006-01-02 15:04"), name)
		if f.Link != "" {
			name += " -> " + f.Link
		}
	}
	_, err := fmt.Fprintln(l.w, name)
	return err
}

// modeString gives ls's ten letters of a st_mode.
func modeString(mode uint32) string {
	b := []byte("?pc?d?b?-?l?s???"[mode>>12:][:1] + "rwxrwxrwx")
	for i := range 9 {
		if mode&(1<<(8-i)) == 0 {
			b[1+i] = '-'
		}
	}
	for _, s := range []struct {
		bit     uint32
		at      int
		letters string
	}{{0o4000, 3, "sS"}, {0o2000, 6, "sS"}, {0o1000, 9, "tT"}} {
		if mode&s.bit != 0 {
			b[s.at] = s.letters[strings.IndexByte("x-", b[s.at])]
		}
	}
	return string(b)
}
