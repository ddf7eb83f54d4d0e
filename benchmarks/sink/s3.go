package main

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/xml"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
)

const pageSize = 1000

var (
	zeros   = make([]byte, 1<<20)
	buffers = sync.Pool{New: func() any { buffer := make([]byte, 256<<10); return &buffer }}
)

type handler struct {
	store *store
	delay time.Duration
}

// onlyWriter hides io.Discard's own ReadFrom, whose buffer is small.
type onlyWriter struct{ io.Writer }

func discard(body io.Reader) (int64, error) {
	buffer := buffers.Get().(*[]byte)
	defer buffers.Put(buffer)
	return io.CopyBuffer(onlyWriter{io.Discard}, body, *buffer)
}

func (h handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	time.Sleep(h.delay)
	bucket, key, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	query := r.URL.Query()
	w.Header().Set("x-amz-request-id", "sink")
	if key == "" {
		h.bucket(w, r, bucket, query)
		return
	}
	full := bucket + "/" + key
	switch {
	case r.Method == http.MethodPut && query.Has("partNumber"):
		h.putPart(w, r, full, query)
	case r.Method == http.MethodPut && r.Header.Get("x-amz-copy-source") == "":
		h.put(w, r, full)
	case r.Method == http.MethodPost && query.Has("uploads"):
		id := h.store.startUpload(full, remembered(r.Header))
		answer(w, http.StatusOK, initiated{Bucket: bucket, Key: key, UploadID: id})
	case r.Method == http.MethodPost && query.Has("uploadId"):
		h.complete(w, r, bucket, key, query.Get("uploadId"))
	case r.Method == http.MethodGet && query.Has("uploadId"):
		h.listParts(w, bucket, key, query.Get("uploadId"))
	case r.Method == http.MethodDelete && query.Has("uploadId"):
		h.store.forgetUpload(query.Get("uploadId"))
		w.WriteHeader(http.StatusNoContent)
	case r.Method == http.MethodDelete:
		if !h.store.remove(full, r.Header) {
			refuse(w, http.StatusPreconditionFailed, "PreconditionFailed")
			return
		}
		w.WriteHeader(http.StatusNoContent)
	case r.Method == http.MethodGet || r.Method == http.MethodHead:
		h.get(w, r, full)
	default:
		refuse(w, http.StatusNotImplemented, "NotImplemented")
	}
}

func (h handler) bucket(w http.ResponseWriter, r *http.Request, bucket string, query url.Values) {
	switch {
	case r.Method == http.MethodHead || r.Method == http.MethodPut:
		w.WriteHeader(http.StatusOK)
	case r.Method == http.MethodDelete:
		h.store.removeBucket(bucket)
		w.WriteHeader(http.StatusNoContent)
	case r.Method == http.MethodGet && query.Has("location"):
		answer(w, http.StatusOK, location{})
	case r.Method == http.MethodGet && query.Has("uploads"):
		answer(w, http.StatusOK, uploads{Bucket: bucket})
	case r.Method == http.MethodGet && bucket != "":
		h.list(w, bucket, query)
	default:
		refuse(w, http.StatusNotImplemented, "NotImplemented")
	}
}

// remembered are the headers that are given back with an object.
func remembered(sent http.Header) http.Header {
	kept := http.Header{}
	for name, values := range sent {
		lower := strings.ToLower(name)
		isChecksum := strings.HasPrefix(lower, "x-amz-checksum-") && lower != "x-amz-checksum-mode"
		if isChecksum || strings.HasPrefix(lower, "x-amz-meta-") {
			kept[name] = values
		}
	}
	return kept
}

// echo writes those headers of an object that are checksums.
func echo(w http.ResponseWriter, headers http.Header) {
	for name, values := range headers {
		if strings.HasPrefix(name, "X-Amz-Checksum-") && name != "X-Amz-Checksum-Algorithm" {
			w.Header()[name] = values
		}
	}
}

// read takes the body; its bytes where somebody will ask for them.
func read(r *http.Request, key string) (int64, []byte, error) {
	chunked := r.Header.Get("x-amz-decoded-content-length")
	if !keeps(key) {
		size, err := discard(r.Body)
		if chunked != "" && err == nil {
			size, err = strconv.ParseInt(chunked, 10, 64)
		}
		return size, nil, err
	}
	data, err := io.ReadAll(io.LimitReader(r.Body, maxKept))
	if chunked != "" && err == nil {
		data, err = dechunk(data)
	}
	return int64(len(data)), data, err
}

// dechunk undoes aws-chunked; chunk signatures and trailers are passed over.
func dechunk(body []byte) ([]byte, error) {
	reader, plain := bufio.NewReader(bytes.NewReader(body)), bytes.Buffer{}
	for {
		line, err := reader.ReadString('\n')
		if err != nil {
			return nil, err
		}
		digits, _, _ := strings.Cut(strings.TrimSpace(line), ";")
		size, err := strconv.ParseInt(digits, 16, 64)
		if err != nil || size == 0 {
			return plain.Bytes(), err
		}
		if _, err := io.CopyN(&plain, reader, size); err != nil {
			return nil, err
		}
		if _, err := reader.Discard(len("\r\n")); err != nil {
			return nil, err
		}
	}
}

func (h handler) put(w http.ResponseWriter, r *http.Request, key string) {
	size, data, err := read(r, key)
	if err != nil {
		refuse(w, http.StatusBadRequest, "IncompleteBody")
		return
	}
	made := &object{size: size, kept: data, headers: remembered(r.Header)}
	if !h.store.put(key, r.Header, made) {
		refuse(w, http.StatusPreconditionFailed, "PreconditionFailed")
		return
	}
	echo(w, made.headers)
	w.Header().Set("ETag", made.etag)
	w.WriteHeader(http.StatusOK)
}

func (h handler) putPart(w http.ResponseWriter, r *http.Request, key string, query url.Values) {
	number, err := strconv.Atoi(query.Get("partNumber"))
	if err != nil || number < 1 || number > 10000 {
		refuse(w, http.StatusBadRequest, "InvalidArgument")
		return
	}
	size, _, err := read(r, "")
	if err != nil {
		refuse(w, http.StatusBadRequest, "IncompleteBody")
		return
	}
	checksums := remembered(r.Header)
	etag, known := h.store.putPart(query.Get("uploadId"), key, part{number: number, size: size, checksums: checksums})
	if !known {
		refuse(w, http.StatusNotFound, "NoSuchUpload")
		return
	}
	echo(w, checksums)
	w.Header().Set("ETag", etag)
	w.WriteHeader(http.StatusOK)
}

func (h handler) complete(w http.ResponseWriter, r *http.Request, bucket, key, id string) {
	_, _ = discard(r.Body)
	full := bucket + "/" + key
	begun, parts := h.store.partsOf(id, full)
	if begun == nil {
		refuse(w, http.StatusNotFound, "NoSuchUpload")
		return
	}
	made := &object{headers: begun.headers.Clone()}
	for _, item := range parts {
		made.size += item.size
	}
	for name, values := range remembered(r.Header) {
		made.headers[name] = values
	}
	if begun.headers.Get("x-amz-checksum-algorithm") == "SHA256" {
		made.headers.Set("x-amz-checksum-sha256", composite(parts))
	}
	if !h.store.put(full, r.Header, made) {
		refuse(w, http.StatusPreconditionFailed, "PreconditionFailed")
		return
	}
	h.store.forgetUpload(id)
	answer(w, http.StatusOK, completed{Bucket: bucket, Key: key, ETag: made.etag, checksums: checksumsOf(made.headers)})
}

// composite is how S3 makes the SHA-256 of an object from those of its parts.
func composite(parts []part) string {
	all := sha256.New()
	for _, item := range parts {
		digest, _ := base64.StdEncoding.DecodeString(item.checksums.Get("x-amz-checksum-sha256"))
		all.Write(digest)
	}
	return fmt.Sprintf("%s-%d", base64.StdEncoding.EncodeToString(all.Sum(nil)), len(parts))
}

func (h handler) get(w http.ResponseWriter, r *http.Request, key string) {
	found := h.store.get(key)
	if found == nil {
		refuse(w, http.StatusNotFound, "NoSuchKey")
		return
	}
	if wanted := r.Header.Get("If-Match"); wanted != "" && !sameETag(wanted, found.etag) {
		refuse(w, http.StatusPreconditionFailed, "PreconditionFailed")
		return
	}
	head, status, start, length := w.Header(), http.StatusOK, int64(0), found.size
	if asked := r.Header.Get("Range"); asked != "" {
		var ok bool
		if start, length, ok = parseRange(asked, found.size); !ok {
			refuse(w, http.StatusRequestedRangeNotSatisfiable, "InvalidRange")
			return
		}
		status = http.StatusPartialContent
		head.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", start, start+length-1, found.size))
	}
	for name, values := range found.headers {
		if strings.HasPrefix(name, "X-Amz-Meta-") {
			head[name] = values
		}
	}
	if strings.EqualFold(r.Header.Get("x-amz-checksum-mode"), "enabled") && status == http.StatusOK {
		echo(w, found.headers)
	}
	head.Set("Accept-Ranges", "bytes")
	head.Set("Content-Type", "application/octet-stream")
	head.Set("Content-Length", strconv.FormatInt(length, 10))
	head.Set("ETag", found.etag)
	head.Set("Last-Modified", found.modified.Format(http.TimeFormat))
	w.WriteHeader(status)
	if r.Method == http.MethodGet {
		send(w, found, start, length)
	}
}

func send(w io.Writer, found *object, start, length int64) {
	if found.kept != nil {
		_, _ = w.Write(found.kept[start : start+length])
		return
	}
	for length > 0 {
		size := min(length, int64(len(zeros)))
		if _, err := w.Write(zeros[:size]); err != nil {
			return
		}
		length -= size
	}
}

// parseRange understands one range: a-b, a- and -n.
func parseRange(text string, size int64) (start, length int64, ok bool) {
	first, last, found := strings.Cut(strings.TrimPrefix(text, "bytes="), "-")
	if !found {
		return 0, 0, false
	}
	end := size - 1
	if first == "" {
		suffix, err := strconv.ParseInt(last, 10, 64)
		if err != nil {
			return 0, 0, false
		}
		start = max(size-suffix, 0)
	} else {
		var err error
		if start, err = strconv.ParseInt(first, 10, 64); err != nil {
			return 0, 0, false
		}
		if last != "" {
			if end, err = strconv.ParseInt(last, 10, 64); err != nil {
				return 0, 0, false
			}
			end = min(end, size-1)
		}
	}
	return start, end - start + 1, start <= end
}

func (h handler) list(w http.ResponseWriter, bucket string, query url.Values) {
	after := query.Get("start-after")
	if token := query.Get("continuation-token"); token != "" {
		decoded, err := base64.URLEncoding.DecodeString(token)
		if err != nil {
			refuse(w, http.StatusBadRequest, "InvalidArgument")
			return
		}
		after = string(decoded)
	}
	most := pageSize
	if asked, err := strconv.Atoi(query.Get("max-keys")); err == nil {
		most = min(asked, pageSize)
	}
	prefix, delimiter := query.Get("prefix"), query.Get("delimiter")
	lines, more := h.store.list(bucket, prefix, delimiter, after, most)
	encoded := func(text string) string { return text }
	if query.Get("encoding-type") == "url" {
		encoded = url.QueryEscape
	}
	page := listing{
		Name: bucket, Prefix: encoded(prefix), Delimiter: encoded(delimiter), EncodingType: query.Get("encoding-type"),
		MaxKeys: most, KeyCount: len(lines), IsTruncated: more,
	}
	for _, line := range lines {
		if line.object == nil {
			page.CommonPrefixes = append(page.CommonPrefixes, commonPrefix{encoded(line.key)})
			continue
		}
		page.Contents = append(page.Contents, contents{
			encoded(line.key), line.modified.Format(time.RFC3339), line.etag, line.size, "STANDARD",
		})
	}
	if more {
		page.NextContinuationToken = base64.URLEncoding.EncodeToString([]byte(lines[len(lines)-1].key))
	}
	answer(w, http.StatusOK, page)
}

func (h handler) listParts(w http.ResponseWriter, bucket, key, id string) {
	begun, parts := h.store.partsOf(id, bucket+"/"+key)
	if begun == nil {
		refuse(w, http.StatusNotFound, "NoSuchUpload")
		return
	}
	page := partListing{Bucket: bucket, Key: key, UploadID: id, MaxParts: 10000}
	for _, item := range parts {
		page.Parts = append(page.Parts, listedPart{item.number, item.etag, item.size, checksumsOf(item.checksums)})
	}
	answer(w, http.StatusOK, page)
}

func answer(w http.ResponseWriter, status int, body any) {
	text, err := xml.Marshal(body)
	if err != nil {
		panic(err)
	}
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(status)
	_, _ = w.Write(append([]byte(xml.Header), text...))
}

func refuse(w http.ResponseWriter, status int, code string) {
	answer(w, status, failure{Code: code, Message: "the sink says so"})
}
