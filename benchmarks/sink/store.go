package main

import (
	"fmt"
	"maps"
	"net/http"
	"path"
	"sort"
	"strings"
	"sync"
	"time"
)

// maxKept is the longest body that is kept at all: a manifest of very many files is some ten MB.
const maxKept = 64 << 20

// object is what is known of one; its content is zeros unless kept is set.
type object struct {
	size     int64
	etag     string
	modified time.Time
	headers  http.Header // checksums and x-amz-meta-*, as they were sent
	kept     []byte
}

type part struct {
	number    int
	size      int64
	etag      string
	checksums http.Header
}

type upload struct {
	key     string
	headers http.Header
	parts   map[int]part
}

// store holds all buckets: a key here is "bucket/key".
type store struct {
	sync.Mutex
	objects map[string]*object
	sorted  []string // nil: to be made anew
	uploads map[string]*upload
	counter int
}

func newStore() *store {
	return &store{objects: map[string]*object{}, uploads: map[string]*upload{}}
}

// keeps says whether an object's bytes matter to somebody: our own small ones are read back.
func keeps(key string) bool {
	name := path.Base(key)
	return name == ".metadata.json" || strings.HasPrefix(name, ".probe-")
}

// nextETag looks like that of a multipart upload, which no client takes for an MD5. The lock is held.
func (s *store) nextETag() string {
	s.counter++
	return fmt.Sprintf("\"%032x-1\"", s.counter)
}

// allows evaluates the conditions of a write. The lock is held.
func (s *store) allows(key string, request http.Header) bool {
	found := s.objects[key]
	if request.Get("If-None-Match") == "*" && found != nil {
		return false
	}
	wanted := request.Get("If-Match")
	return wanted == "" || (found != nil && sameETag(wanted, found.etag))
}

func sameETag(a, b string) bool {
	return strings.Trim(a, `"`) == strings.Trim(b, `"`)
}

// put makes the object if the conditions of the request hold.
func (s *store) put(key string, request http.Header, made *object) bool {
	s.Lock()
	defer s.Unlock()
	if !s.allows(key, request) {
		return false
	}
	if s.objects[key] == nil {
		s.sorted = nil
	}
	made.etag, made.modified = s.nextETag(), time.Now().UTC()
	s.objects[key] = made
	return true
}

func (s *store) get(key string) *object {
	s.Lock()
	defer s.Unlock()
	return s.objects[key]
}

func (s *store) remove(key string, request http.Header) bool {
	s.Lock()
	defer s.Unlock()
	if s.objects[key] == nil {
		return true
	}
	if !s.allows(key, request) {
		return false
	}
	delete(s.objects, key)
	s.sorted = nil
	return true
}

// removeBucket forgets a bucket with all that is in it.
func (s *store) removeBucket(bucket string) {
	s.Lock()
	defer s.Unlock()
	s.sorted = nil
	maps.DeleteFunc(s.objects, func(key string, _ *object) bool { return strings.HasPrefix(key, bucket+"/") })
	maps.DeleteFunc(s.uploads, func(_ string, begun *upload) bool { return strings.HasPrefix(begun.key, bucket+"/") })
}

func (s *store) startUpload(key string, headers http.Header) string {
	s.Lock()
	defer s.Unlock()
	s.counter++
	id := fmt.Sprintf("upload-%d", s.counter)
	s.uploads[id] = &upload{key, headers, map[int]part{}}
	return id
}

func (s *store) putPart(id, key string, made part) (string, bool) {
	s.Lock()
	defer s.Unlock()
	found := s.uploads[id]
	if found == nil || found.key != key {
		return "", false
	}
	made.etag = s.nextETag()
	found.parts[made.number] = made
	return made.etag, true
}

// partsOf returns the parts in order, and whether there is such an upload.
func (s *store) partsOf(id, key string) (*upload, []part) {
	s.Lock()
	defer s.Unlock()
	found := s.uploads[id]
	if found == nil || found.key != key {
		return nil, nil
	}
	parts := make([]part, 0, len(found.parts))
	for _, item := range found.parts {
		parts = append(parts, item)
	}
	sort.Slice(parts, func(i, j int) bool { return parts[i].number < parts[j].number })
	return found, parts
}

func (s *store) forgetUpload(id string) {
	s.Lock()
	defer s.Unlock()
	delete(s.uploads, id)
}

// listed is one line of a listing: an object, or (with object nil) what several have in common up to a delimiter.
type listed struct {
	key string
	*object
}

// list returns at most so many lines below bucket and prefix after a key, and whether there are more.
func (s *store) list(bucket, prefix, delimiter, after string, most int) (lines []listed, more bool) {
	s.Lock()
	defer s.Unlock()
	if s.sorted == nil {
		s.sorted = make([]string, 0, len(s.objects))
		for key := range s.objects {
			s.sorted = append(s.sorted, key)
		}
		sort.Strings(s.sorted)
	}
	root := bucket + "/"
	for at := sort.SearchStrings(s.sorted, root+max(prefix, after)); at < len(s.sorted); at++ {
		full := s.sorted[at]
		if !strings.HasPrefix(full, root+prefix) {
			break
		}
		line := listed{strings.TrimPrefix(full, root), s.objects[full]}
		if delimiter != "" {
			if cut := strings.Index(line.key[len(prefix):], delimiter); cut >= 0 {
				line = listed{line.key[:len(prefix)+cut+len(delimiter)], nil}
			}
		}
		repeated := len(lines) > 0 && lines[len(lines)-1].key == line.key
		if repeated || line.key <= after {
			continue
		}
		if len(lines) == most {
			return lines, true
		}
		lines = append(lines, line)
	}
	return lines, false
}
